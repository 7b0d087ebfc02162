"""The hosting vendor's sizing convention, reproduced so that it can be explained.

sessions = (0.90 M - W / n - 2.5 GiB) / K
"""
