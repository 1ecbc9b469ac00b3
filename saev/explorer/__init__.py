"""The explorer: one HTML file to look at all latents of SAEs, `saev report --run … --out FILE`.

Modules: :mod:`saev.explorer.data` (what is known of latents), :mod:`saev.explorer.pictures` (which
images fit into the file), :mod:`saev.explorer.page` (the file). The source of the script and the
style in `static/` is the folder `web/`; `make web` builds them.
"""
