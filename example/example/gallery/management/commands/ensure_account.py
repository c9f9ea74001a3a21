"""Make an account as described, or leave it alone if it is so already."""

from __future__ import annotations

import os
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from example.gallery.models import Token


class Command(BaseCommand):
    """See the module's text."""

    help = (
        "Ensure that an account exists, with the password and the API token held by environment "
        "variables. Prints “changed” or “unchanged”. A new token replaces the account's others."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments. Secrets come by environment, never on the command line."""
        parser.add_argument("username")
        parser.add_argument("--superuser", action="store_true", help="may use the admin")
        parser.add_argument("--password-env", metavar="VAR", help="variable with the password")
        parser.add_argument("--token-env", metavar="VAR", help="variable with the API token")

    def handle(self, *_args: Any, **options: Any) -> None:
        """Compare, change what differs, say whether anything did."""
        password = self._secret(options["password_env"])
        token = self._secret(options["token_env"])
        with transaction.atomic():
            changed = self._ensure(options["username"], options["superuser"], password, token)
        self.stdout.write("changed" if changed else "unchanged")

    @staticmethod
    def _secret(variable: str | None) -> str | None:
        if variable is None:
            return None
        value = os.environ.get(variable, "")
        if not value:
            raise CommandError(f"The environment variable {variable} is not set.")
        return value

    @staticmethod
    def _ensure(username: str, superuser: bool, password: str | None, token: str | None) -> bool:
        users = get_user_model().objects
        user, changed = users.get_or_create(username=username)
        user = users.select_for_update().get(pk=user.pk)
        if changed and password is None:
            user.set_unusable_password()
        if superuser and not (user.is_superuser and user.is_staff):
            user.is_superuser = user.is_staff = changed = True
        if not user.is_active:
            user.is_active = changed = True
        if password is not None and not user.check_password(password):
            user.set_password(password)
            changed = True
        if changed:
            user.save()
        if token is not None:
            digest = Token.hash(token)
            if list(user.api_tokens.values_list("digest", flat=True)) != [digest]:
                if Token.objects.filter(digest=digest).exclude(user=user).exists():
                    raise CommandError("This token belongs to another account.")
                user.api_tokens.all().delete()
                Token.objects.create(user=user, digest=digest)
                changed = True
        return changed
