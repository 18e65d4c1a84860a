"""Options, the terminal and how a run is watched; everything of the command line but the commands themselves."""
