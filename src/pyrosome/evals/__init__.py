"""What a model can do, on contents that training never shows, with how sure each figure is.

`recall` asks for facts far back, `text` predicts passages, `modes` does sums with and without thought, `tools` calls.
"""
