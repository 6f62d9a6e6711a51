"""Plans: what a store of so many documents will take, before anything is computed: bytes, FLOPs, hours, money.

Nothing here imports torch but `measure`, which measures this machine.
"""
