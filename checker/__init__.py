"""How `rules.py` measures a network: its operations, its blocks, and a folder of answers one by
one.
"""
