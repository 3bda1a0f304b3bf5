"""The web app: pages on the server's own API, with nothing from elsewhere."""
