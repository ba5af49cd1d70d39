"""The blind preference test: what raters are shown, their votes on disk, and the page that they vote on."""
