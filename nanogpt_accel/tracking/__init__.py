"""Report the progress of a run: metrics.jsonl, experiment trackers, console output, loss plot.

In: metrics per step and per evaluation. Out: files in the run folder, terminal output, tracker dashboards.
To report another metric per step, add it to the log section of train.py.
"""
