"""The process: errors, files, signals, workers, several processes. It knows no method.

May import: no other room.
"""
