"""What a finished bench looks like: SVG charts, one self-contained HTML page, CSV and JSON Lines, a Perfetto trace."""
