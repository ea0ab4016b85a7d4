"""One small file a source format, each a command: python -m converters.importers.NAME IN OUT.jsonl --audio-root DIR"""
