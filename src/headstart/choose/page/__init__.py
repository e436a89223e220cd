"""Pictures of a comparison, drawn as SVG on the spot: no script, no font, no library in the page."""
