#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Pin host names in /etc/hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_pins
short_description: Pin host names in /etc/hosts
description:
  - Makes C(/etc/hosts) give exactly one address for each name, so that a pool needs no name server.
  - A file that already does so is left alone, whoever wrote it. Otherwise missing names go into one marked block,
    and a pinned name is taken out of other lines that give it another address
    (the Debian installer gives the machine's own name to C(127.0.1.1), which no peer can reach).
  - The file is written in place, not renamed over, since in a container it is a bind mount.
options:
  pins:
    description: Address of each name.
    type: dict
    required: true
  path:
    description: The file.
    type: path
    default: /etc/hosts
author: [Tribrick authors]
attributes:
  check_mode:
    description: Predicts.
    support: full
  diff_mode:
    description: Shows the file.
    support: full
"""

EXAMPLES = r"""
- name: Pin names
  tribrick.media.host_pins:
    pins: {node1: 192.0.2.11, node2: 192.0.2.12, node3: 192.0.2.13}
"""

RETURN = r"""#"""

import ipaddress
import os

from ansible.module_utils.basic import AnsibleModule

BEGIN = "# BEGIN tribrick names"
END = "# END tribrick names"


def same_family(one, other):
    return ipaddress.ip_address(one).version == ipaddress.ip_address(other).version


def split(line):
    """Return (address, names) of a line; (None, []) when it maps nothing."""
    fields = line.split("#", 1)[0].split()
    if len(fields) < 2:
        return None, []
    try:
        ipaddress.ip_address(fields[0].split("%", 1)[0])
    except ValueError:
        return None, []
    return fields[0], fields[1:]


def satisfied(text, pins):
    """Whether each pin is the first and only address of its family for its name."""
    found = {}
    for line in text.splitlines():
        address, names = split(line)
        for name in names:
            found.setdefault(name.lower(), []).append(address)
    return all(
        {a for a in found.get(name.lower(), []) if "%" not in a and same_family(a, address)} == {address}
        for name, address in pins.items()
    )


def pinned(text, pins):
    """Return the text of the file with all pins in place."""
    if satisfied(text, pins):
        return text
    wanted = {name.lower(): address for name, address in pins.items()}
    lines, inside = [], False
    for line in text.splitlines():
        if line.strip() == BEGIN:
            inside = True
        elif line.strip() == END:
            inside = False
        elif not inside:
            address, names = split(line)
            plain = address is not None and "%" not in address
            wrong = [n for n in names if plain and n.lower() in wanted and same_family(address, wanted[n.lower()])]
            wrong = [n for n in wrong if wanted[n.lower()] != address]
            if wrong:
                rest = [n for n in names if n not in wrong]
                if rest:
                    lines.append(f"{address}\t{' '.join(rest)}")
            else:
                lines.append(line)
    block = [BEGIN, *(f"{address}\t{name}" for name, address in pins.items()), END]
    return "\n".join([*lines, *block]) + "\n"


def main():
    module = AnsibleModule(
        argument_spec={"pins": {"type": "dict", "required": True}, "path": {"type": "path", "default": "/etc/hosts"}},
        supports_check_mode=True,
    )
    pins, path = module.params["pins"], module.params["path"]
    for name, address in pins.items():
        try:
            ipaddress.ip_address(address)
        except ValueError:
            module.fail_json(msg=f"The address of {name} must be a plain IP address, not {address!r}")
    before = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            before = stream.read()
    after = pinned(before, pins)
    if after != before and not module.check_mode:
        with open(path, "r+" if os.path.exists(path) else "w", encoding="utf-8", errors="surrogateescape") as stream:
            # Longer text first, cut afterwards: a reader never sees an empty file.
            stream.write(after)
            stream.truncate()
            stream.flush()
            os.fsync(stream.fileno())
    module.exit_json(
        changed=after != before, diff={"before": before, "after": after, "before_header": path, "after_header": path}
    )


if __name__ == "__main__":
    main()
