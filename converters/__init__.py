"""Any data set -> AudioQA manifest (`importers`) -> ms-swift JSONL (`sft_jsonl`), verl Parquet (`rl_parquet`).

The one record in the middle is `echo_plugins.audio_qa`; `check` says what a file of any of these kinds is and what is
wrong with it.
"""
