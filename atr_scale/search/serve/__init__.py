"""The search page, a web server over an index: `server` starts it, `app` has its addresses, `pages` are its files."""
