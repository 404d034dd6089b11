// Boost.JSON compiled in, in the namespace that the build gives it: a program may bring its own copy, of any version.
#include <boost/json/src.hpp>
