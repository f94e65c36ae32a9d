"""What a run reports: metrics.jsonl, experiment trackers, the console, the loss plot.

In: numbers per step and per evaluation. Out: files in the run folder, lines on the terminal, a tracker's dashboard.
To add a metric per step, add it to train.py's log section; every output gets it.
"""
