"""Everything that a run reports: metrics.jsonl, experiment trackers, the console, the loss plot.

In: numbers per step and per evaluation. Out: files in the run folder, terminal output, a tracker's dashboard.
To add a metric per step, add it to the log section of train.py; all outputs then include it.
"""
