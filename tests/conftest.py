"""What every test shares: few threads, no network, no terminal width of somebody's own."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("COLUMNS", "120")
