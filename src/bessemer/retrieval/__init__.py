"""Retrieval: documents cut into passages, indexed by words and by meaning, found, and answered from with citations.

A package above `assistant` and below `posttraining`. `documents` finds documents, `reading` reads office files, `chunks` cuts,
`embed` gives vectors, `store` keeps and searches, `index` builds and updates, `search` fuses, `answer` answers.
"""
