// Compiles Boost.JSON in, under a namespace that the build chooses, so that a program may bring its own copy in any
// version.
#include <boost/json/src.hpp>
