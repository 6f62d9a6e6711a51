"""Answers behind a memory, many at a time in a loop, or by the stock model's own `generate`.

All that is known of `generate` and of chat templates is here; nothing here knows documents or a store.
"""
