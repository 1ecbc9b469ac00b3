"""The live explorer: `saev serve` shows the SAEs of a root in the browser.

Modules: :mod:`saev.serve.command` (the command), :mod:`saev.serve.app` (addresses),
:mod:`saev.serve.access` (who may ask), :mod:`saev.serve.problems` (answers to wrong questions),
:mod:`saev.serve.catalogue` (which SAEs there are), :mod:`saev.serve.measured` (tables of one SAE),
:mod:`saev.serve.facts`, :mod:`saev.serve.columns`, :mod:`saev.serve.curves`,
:mod:`saev.serve.latents`, :mod:`saev.serve.images`, :mod:`saev.serve.comparing`,
:mod:`saev.serve.matching`,
:mod:`saev.serve.searching` and :mod:`saev.serve.pictures` (answers), :mod:`saev.serve.notes`,
:mod:`saev.serve.cache` (memory), :mod:`saev.serve.work` (threads).
"""
