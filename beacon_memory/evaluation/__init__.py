"""Evaluation: how well questions are answered from compressed memory, compared with other ways to answer them.

Needs the extra `eval`. It reads texts with the compressor and answers with `generation`, as a memory does; nothing here
knows a store.
"""
