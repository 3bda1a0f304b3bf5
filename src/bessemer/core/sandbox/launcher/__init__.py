"""The process that confines a program, then becomes it. Standard library only.

It is started as `python -I -S` for every run, so that no thread, lock or descriptor of the caller is forked. Modules here
import each other relatively and nothing else of Bessemer, and leave out what is slow to import (`typing`, `json`, `re`).
"""
