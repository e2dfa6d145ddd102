"""`video-r1 studio`: one local page over run folders, also while they train. It only reads files.

    folders ─► runs (state, figures, alerts) ─► curves, recorded groups ─► JSON ─► the page
                                                        (studio.html, its scripts and the report's)

Each part of the page is a file that lists its addresses (`ROUTES`), such as runs.py; server.py joins them.
"""
