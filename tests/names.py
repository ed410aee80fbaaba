"""Names of files and folders that libraries take for patterns, addresses or something else."""

AWKWARD = (
    "w [v2]",
    "a*b?",
    "**",
    "back\\slash",
    "n\nl",
    "\u00e9 \u65e5",
    "q\"'",
    "#1",
    "{x}",
    "gs:",
    "y" * 240,
)
