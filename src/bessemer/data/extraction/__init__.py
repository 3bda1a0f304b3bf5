"""Main-content extraction: the text of a web page without menus, advertisements and other surroundings."""
