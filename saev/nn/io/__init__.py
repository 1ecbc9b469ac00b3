"""SAEs in files.

native.py    the checkpoint folder that saev writes
load.py      ``load_sae``: any SAE, from a folder, a file or the hub
foreign.py   finds the project that wrote a file; one module per project reads it
files.py     safe parsers for files of other projects
"""
