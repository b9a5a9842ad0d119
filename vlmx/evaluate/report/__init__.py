"""What came out, on one page? Runs on disk -> plain data -> one HTML file that needs no network.

runs, caches ─ collect ─▶ Report ─┬─ plots (SVG) ──┐
                                  ├─ table ────────┼─ html ─▶ report.html
                                  └─ pictures (PNG)┘
"""
