"""The assistant: one turn of a conversation, without any transport.

- turn: everything between a user's message and the next: messages of the assistant, and tool results between them.
- round: one message of the assistant, generated once, or in several attempts where a hook sends it back.
- transcript: a conversation as token ids, which only grow.
- origin: the author of a part of a message. Documents, tool results and memory are tainted.
"""
