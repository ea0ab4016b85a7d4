"""Training rows from labelled audio, written by models: the pipelines of Echo (`eaqa`) and Audio-Cogito (`cogito`).

    python -m converters.synthesis.eaqa CONFIG.yaml [--stage NAME ...] [--dry-run]
    python -m converters.synthesis.plan RUN            # what the papers' sizes would cost and take

`config` what a config file may say; `sample` the record that passes through the stages; `templates` the prompt files
and their versions; `stages` what both pipelines do alike; `runner` runs stages on datatrove's executors, restartable;
`filters` judges rows and the set; `selection` the last stage, which writes the rows; `report` the page about a run.
"""
