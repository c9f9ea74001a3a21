"""No pages: files are what is tested."""

urlpatterns: list = []
