"""Fact tables of the sample corpus, one topic a file. `scripts/make_sample_data.py` turns them into dataset/sample/."""
