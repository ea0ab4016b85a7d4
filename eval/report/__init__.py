"""The listening report: one page on which a person sees, and hears, what a model listened to again.

    python -m eval.report RUN [RUN_B] -o report.html

runs.py   what a run left on disk -> rows        sound.py   an audio file -> waveform, spectrogram, embedded copy
page.py   rows and sounds -> one HTML file, of page.html, page.css and page.js
"""
