"""What a finished or running training looks like: logs read, verdicts, charts, pictures.

May import: all but cli.
"""
