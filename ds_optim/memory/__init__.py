"""The memory accountant: one record, measured or predicted; claims judged on it; reports made from it.

`record` is the data and knows nothing of the rest; `accountant` measures one, `estimate` predicts one, `claims` judges
them, `report` shows them.
"""
