"""On the path of a suite that does not patch by itself: it and its children start as a gevent server does.

GREENAIO_PATCH says whether greenaio patches, too. A patched call is the plain one until there is a hub.
"""

import gevent
import gevent.monkey

gevent.monkey.patch_all()
gevent.get_hub()
