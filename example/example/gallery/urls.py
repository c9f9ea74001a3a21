"""Addresses of pages and API."""

from django.contrib.auth import views as auth
from django.urls import path

from example.gallery import api, views

urlpatterns = [
    path("", views.gallery, name="gallery"),
    path("album/", views.album, name="album"),
    path("upload/", views.upload, name="upload"),
    path("picture/<int:pk>/", views.picture, name="picture"),
    path("picture/<int:pk>/delete/", views.delete, name="delete"),
    path("private/<path:name>", views.private_file, name="private-file"),
    path("login/", auth.LoginView.as_view(redirect_authenticated_user=True), name="login"),
    path("logout/", auth.LogoutView.as_view(), name="logout"),
    path("api/media/", api.collection),
    path("api/media/<path:name>", api.item),
]
