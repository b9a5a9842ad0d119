"""What came out, on one page? Runs on disk, and the paper's rows -> plain data -> one HTML file that needs no network.

runs ─ run_data ─ collect ─▶ Report ─┬─ rankings, samples, map_samples (pictures: PNG, JPEG) ─┐
                                     ├─ plots, published_plots (SVG), correlation ────────────┼─ html ─▶ report.html
                                     └─ paper_table ─┬────────────────────────────────────────┘
                                                     └─▶ the paper's rows as CSV and LaTeX
"""
