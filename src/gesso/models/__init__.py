"""Networks that no library keeps. Nothing here knows of requests, files, devices or loops."""
