"""The assistant: one turn of a conversation, without any transport.

- turn: what follows what a user says, up to an answer: a few messages of the assistant's with results of tools between them.
- round: one message of the assistant's in a turn, generated once or, where a hook sends it back, several times (attempts).
- transcript: a conversation as token ids, which only grow.
- origin: who wrote a part of a message. What no user and no system prompt says is tainted.
"""
