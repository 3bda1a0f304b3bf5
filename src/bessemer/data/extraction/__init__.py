"""The main text of web pages: what a reader came for, without menus, advertisements and what else surrounds it."""
