"""SAEs in files.

native.py    the checkpoint folder that saev writes
load.py      ``load_sae``: any SAE, from a folder, a file or the hub
foreign.py   which other project a file is of; one module per project reads it
files.py     parsers of other projects' files, which trust nothing
"""
