"""One local page over run folders that is open while they train: `video-r1 studio`. It reads files alone.

    folders ─► runs (state, figures, alerts) ─► curves, recorded groups ─► JSON ─► the page
                                                        (studio.html, its scripts and the report's)

A part of the page is a file that names its addresses (`ROUTES`), such as runs.py; server.py joins them.
"""
