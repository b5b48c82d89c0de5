"""The HTML pages: templates, one stylesheet, and the viewer of volumes."""
