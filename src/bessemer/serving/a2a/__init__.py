"""The Agent2Agent protocol: a card that says what this server can do, and messages that become tasks."""
