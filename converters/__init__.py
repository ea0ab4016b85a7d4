"""Any data set -> AudioQA manifest (`importers`) -> ms-swift JSONL (`sft_jsonl`), verl Parquet (`rl_parquet`).

`audio_qa` is the one record in the middle; `check` says what a file of any of these kinds is and what is wrong with it.
"""
