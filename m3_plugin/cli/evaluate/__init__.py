"""`m3-plugin eval`: does a served model find what it was told?"""
