"""Where models are found and how their files are read. Nothing here runs a network."""
