"""A folder of images of one's own: clusters, a table and a page."""
