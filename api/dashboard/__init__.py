"""The dashboard: pages rendered on the server, kept current by htmx, with charts drawn by uPlot. No build step, no CDN.

The server is the only state, so a reload, a second tab or a restart of the service shows the same thing. The road not
taken is a single-page application: a toolchain, megabytes of script, and a second copy of the state that drifts.
"""
