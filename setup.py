"""Says to pip what this is: flat modules such as `main` and `data` would get in the way of other packages."""

raise SystemExit(
    "Deep Generative Replay runs from its directory and is not installed: pip install -r requirements.txt, then "
    "./main.py --help (to import it from elsewhere, add this directory to PYTHONPATH)"
)
